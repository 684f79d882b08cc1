"""The playground: one page of plain HTML, style and modules, which needs nothing from outside and no build step.

    index.html       what is there            page.js         what it does
    playground.css   light, dark, narrow      stream.js       OpenAI's interface: models, an answer token by token
                                              difference.js   which tokens of an answer are not in another
"""

from pathlib import Path

FOLDER = Path(__file__).parent
TYPES = {"playground.css": "text/css", "page.js": "text/javascript", "stream.js": "text/javascript",
         "difference.js": "text/javascript"}
"""The files that the page loads, with their media types."""
