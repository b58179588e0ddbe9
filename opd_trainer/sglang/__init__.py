"""What server rollouts and server teachers share: HTTP client, wire format, server processes, a fake server."""
