"""The Hugging Face Hub: names of published models, downloads into its cache, uploads."""
