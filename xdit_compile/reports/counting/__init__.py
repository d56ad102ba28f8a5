"""What a card would run of a program, counted in the code that is generated for it; nothing is run or timed."""
