"""The HTTP server with the interface of OpenAI for images."""
