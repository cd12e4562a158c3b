"""Pictures: their file formats, PNG as bytes, and MATLAB's bicubic."""
