"""PNG files that contain how they were made: a text chunk per setting, and IPTC's source type in XMP."""

import io
from collections.abc import Mapping
from xml.sax.saxutils import quoteattr

from PIL import Image

from pixart.sampling.png import XMP_CHUNK, text_chunks

# https://cv.iptc.org/newscodes/digitalsourcetype/: created by a model that was trained on samples
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CREATOR_TOOL = "pixart-suite"
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmp:CreatorTool={tool} Iptc4xmpExt:DigitalSourceType={source_type}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def xmp() -> str:
    """Return the XMP packet that declares an image as made by a trained model."""
    return XMP.format(tool=quoteattr(CREATOR_TOOL), source_type=quoteattr(DIGITAL_SOURCE_TYPE))


def encode_png(image: Image.Image, settings: Mapping[str, str]) -> bytes:
    """Return an image as PNG with its settings, in text chunks as `sample` writes them, and the XMP packet."""
    text = text_chunks(settings)
    text.add_itxt(XMP_CHUNK, xmp())
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=text)
    return buffer.getvalue()
