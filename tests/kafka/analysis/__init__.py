"""What reads a topic beside our own source: ClickHouse's engine in a process, and Flink in another."""
