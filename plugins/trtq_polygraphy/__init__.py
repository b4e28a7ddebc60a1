"""trtq in Polygraphy: the runners `--trtq-int8` and `--trtq-engine` of `polygraphy run`.

`args` is the extension module that Polygraphy loads; `loaders` is what the scripts that it writes call.
"""
