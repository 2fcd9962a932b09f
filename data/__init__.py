# makes `data` importable: each data/NAME/prepare.py shares data/common.py
