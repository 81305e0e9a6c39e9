"""The bench: fewstep and its peers, measured in one run by long-lived worker processes."""
