"""From requests to images: what the page and the servers have in common."""
