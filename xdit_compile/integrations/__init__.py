"""Where others run xdit_compile: clusters of Ray, and the graphs of ComfyUI."""
