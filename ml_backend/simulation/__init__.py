"""The loop on images that are labelled already."""
