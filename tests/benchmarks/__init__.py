"""Speed and size beside the driver and the peers, as ratios taken in one run."""
