"""What a newcomer tries first: Label Studio, this backend, and a project of generated images."""
