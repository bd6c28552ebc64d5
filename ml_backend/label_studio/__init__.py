"""All that is Label Studio's: its API, its label config, its regions, its events, its images."""
