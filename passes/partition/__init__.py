"""From a typed program to what one rank runs."""
