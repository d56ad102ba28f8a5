"""What each operator says about axes, and how it is done on one rank."""
