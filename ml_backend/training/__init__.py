"""From stored annotations to a version that goes live or not."""
