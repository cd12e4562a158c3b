"""`lora-sr prepare`: folders of images to the LMDB pairs that BasicSR reads."""


def add_parser(commands):
    raise NotImplementedError
