// Searching runs in a worker, and browsers start none for pages from the disk: there, an inner frame does its work.
// (The name of this file tells the theme that it need not fetch such a thing from another host.)
if (location.protocol === "file:")
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.frame = frame
      this.inner = frame.contentWindow
      this.hear = ({ source, data }) => {
        if (source === this.inner) this.dispatchEvent(new MessageEvent("message", { data }))
      }
      window.addEventListener("message", this.hear)
      const load = (script) =>
        new Promise((resolve, reject) => {
          const element = document.createElement("script")
          element.src = script
          element.onload = resolve
          element.onerror = reject
          document.body.append(element)
        })
      const inner = frame.contentDocument
      inner.open()
      inner.write(
        `<body><script>
          window.postMessage = (message) => parent.postMessage(message, "*")
          const load = ${load}
          window.importScripts = async (...scripts) => { for (const script of scripts) await load(script) }
        </script><script src="${url}"></script>`,
      )
      // Not before: opening a document takes all listeners away.
      this.ready = new Promise((resolve) => this.inner.addEventListener("load", resolve))
      inner.close()
    }

    async postMessage(data) {
      await this.ready
      this.inner.dispatchEvent(new MessageEvent("message", { data }))
    }

    terminate() {
      window.removeEventListener("message", this.hear)
      this.frame.remove()
    }
  }
