"""Pictures: their file formats, and MATLAB's bicubic."""
