"""What one rank holds: the layout, its graph, the rows of its neighbours, the ledger of what is sent."""
