import sys

from ensemble_decode.cli import main

sys.exit(main())
