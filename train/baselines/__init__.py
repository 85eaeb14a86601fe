"""Purifiers of others, written anew and trained on the same pairs: what MAEP is compared with."""
