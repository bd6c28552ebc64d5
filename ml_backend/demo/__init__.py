"""Run Label Studio and this backend together, with a project of generated images."""
