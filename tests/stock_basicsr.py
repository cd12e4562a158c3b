"""BasicSR as it is without the patches, and its bare model."""

from basicsr.models import realesrgan_model, realesrnet_model
from basicsr.models.base_model import BaseModel

MODELS = [(realesrnet_model, 'RealESRNetModel'), (realesrgan_model, 'RealESRGANModel')]


def stock(module, name):
    """A function as BasicSR's file has it: its source, run again where the patches do not reach."""
    namespace = dict(vars(module))
    namespace['__name__'] = 'stock'
    with open(module.__file__, encoding='utf-8') as file:
        exec(compile(file.read(), module.__file__, 'exec'), namespace)
    return namespace[name]


def model(folder=None, **opt):
    base = {'num_gpu': 0, 'is_train': True, 'dist': False}
    return BaseModel(dict(base, path={'models': str(folder), 'training_states': str(folder)}, **opt))
