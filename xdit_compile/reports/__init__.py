"""What people read of all this: `explain`, and dumps of passes."""
