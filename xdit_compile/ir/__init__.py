"""What a captured program is: graphs, the axes of their tensors, and how positions lie on ranks."""
