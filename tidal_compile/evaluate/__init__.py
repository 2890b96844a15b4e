"""Tasks that show whether a policy still answers as the dense model does."""
