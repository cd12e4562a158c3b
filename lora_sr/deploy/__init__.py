"""From training to use: merging, and what ships."""
