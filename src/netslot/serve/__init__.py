"""The daemon: HTTP/1.1 with JSON on a unix socket, and what goes on behind it; and its client."""
