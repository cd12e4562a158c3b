"""Copy photographs that come with scikit-image to FOLDER/train and FOLDER/test."""

import shutil
import sys
from pathlib import Path

import skimage.data

TEST = ('chelsea.png', 'coffee.png')
TRAIN = (
    'astronaut.png',
    'brick.png',
    'grass.png',
    'gravel.png',
    'hubble_deep_field.jpg',
    'ihc.png',
    'motorcycle_left.png',
    'retina.jpg',
    'rocket.jpg',
)

if __name__ == '__main__':
    folder, source = Path(sys.argv[1]), Path(skimage.data.__file__).parent
    for name, files in (('train', TRAIN), ('test', TEST)):
        (folder / name).mkdir(parents=True)
        # Versions of scikit-image differ in what they ship; these few have been there for years.
        copied = [shutil.copy(source / file, folder / name) for file in files if (source / file).exists()]
        if len(copied) < min(2, len(files)):
            sys.exit(f'error: scikit-image ({source}) does not hold the photographs {", ".join(files)}')
        print(f'{folder / name}: {len(copied)} photographs')
