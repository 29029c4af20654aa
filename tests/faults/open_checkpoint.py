"""Opens every checkpoint directory it is given as a start does; prints a JSON line for each."""

import json
import sys
from pathlib import Path

from dsv3.checkpoint.source import open_source
from dsv3.errors import Dsv3Error
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Sampling
from dsv3.text.tokenizer import Tokenizer

for name in sys.argv[1:]:
    folder, error = Path(name), ""
    try:
        open_source(folder).close()
        Sampling.of_checkpoint(folder)
        ChatFormat(Tokenizer.load(folder)).render([{"role": "user", "content": "Hi"}])
    except Dsv3Error as caught:
        error = str(caught)
    sys.stdout.write(json.dumps(error) + "\n")
