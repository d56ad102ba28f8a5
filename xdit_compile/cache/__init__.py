"""Compiled programs kept from run to run, sealed."""
