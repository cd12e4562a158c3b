"""Pillow's modes: the kinds of pixels that it has."""

GRAY_MODES, ALPHA_MODES = ('1', 'L', 'LA', 'La'), ('LA', 'La', 'PA', 'RGBA', 'RGBa')
MODES_OF_8_BITS = (*GRAY_MODES, *ALPHA_MODES, 'P', 'RGB', 'RGBX', 'YCbCr')
