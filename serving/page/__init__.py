"""The page for a trained model in the browser."""
