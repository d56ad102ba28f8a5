"""Nodes for ComfyUI, which loads this folder as it is."""
