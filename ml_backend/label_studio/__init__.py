"""Label Studio's formats and interfaces: API, label config, controls, webhooks, images."""
