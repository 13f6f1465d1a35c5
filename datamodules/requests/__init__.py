"""Requests for images of classes or prompts."""
