"""An HTTP service: a front process that never computes, and ranks beside it that do."""
