"""What commands do once they were checked: imports whatever that needs."""
