"""Pages contain everything they show, and every value is escaped."""

from PIL import Image

from imprompt.utils.html import image_table, inline_image, key_value_table, render_html, results_table, write_page


def test_values_are_escaped_and_markup_is_not():
    table = key_value_table({"<name>": "<value> & 'more'", "count": 12345, "loss": 0.123456, "flag": True})
    assert "&lt;name&gt;" in table and "&lt;value&gt; &amp; &#39;more&#39;" in table and "<value>" not in table
    assert "12,345" in table and "0.1235" in table and "True" in table
    assert render_html("<p>{{ text }}</p>{{ table }}", text="<b>", table=table) == f"<p>&lt;b&gt;</p>{table}"


def test_the_margin_of_a_result_stands_below_it():
    table = results_table([["", "CLIP-I"], ["a < b", "0.612 ± 0.010"], ["text only", "–"]])
    assert "<th>a &lt; b<td>0.612<br><small>± 0.010" in table and "<th>text only<td>–" in table
    assert table.count("<tr>") == 3


def test_images_are_inside_the_page(tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    alt = "it's <red>"
    assert inline_image(image, alt).startswith("<img alt='it&#39;s &lt;red&gt;' src='data:image/png;base64,")
    write_page(tmp_path / "index.html", "A < B", image_table({alt: image}), "heading \udcff")
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "<title>A &lt; B</title>" in page and "<h1>heading \\udcff</h1>" in page
    assert page.count("data:image/png") == 1 and "://" not in page and "<th>it&#39;s &lt;red&gt;<td><img" in page
