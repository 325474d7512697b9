"""The built-in jobs' problems, rewards and tokenizers."""
