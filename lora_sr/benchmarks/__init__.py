"""Speed and memory beside the alternatives, as ratios from one run."""
