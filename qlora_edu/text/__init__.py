"""Conversations, generation and perplexity: what a language model reads and writes."""
