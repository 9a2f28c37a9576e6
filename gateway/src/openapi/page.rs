//! The document as a page: plain HTML without scripts, made once.

use std::fmt::{self, Write};

use serde_json::Value;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
h2{font:600 1.1rem ui-monospace,monospace;margin:2.5rem 0 .25rem;border-top:1px solid #ddd;padding-top:1rem}\
table{border-collapse:collapse;width:100%}td{border-top:1px solid #eee;padding:.25rem .75rem .25rem 0;vertical-align:top}\
td:first-child{font-family:ui-monospace,monospace}td:nth-child(2){color:#666}b{color:#06c}";

/// The whole page.
pub(super) fn html(document: &Value) -> String {
    let mut page = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut page, document);
    page
}

fn write(out: &mut String, document: &Value) -> fmt::Result {
    let title = Text(&document["info"]["title"]);
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{title} {}</h1>\n<p>{} \
         The same for machines: <a href=\"openapi.json\">openapi.json</a>.</p>\n",
        Text(&document["info"]["version"]),
        Text(&document["info"]["description"]),
    )?;
    for (path, methods) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in methods.as_object().into_iter().flatten() {
            write!(
                out,
                "<h2><b>{}</b> {}</h2>\n<p>{}</p>\n",
                method.to_uppercase(),
                Escaped(path),
                Text(&operation["summary"]),
            )?;
            write_inputs(out, document, operation)?;
        }
    }
    out.push_str("</body></html>\n");
    Ok(())
}

/// Query parameters, or the fields of the body.
fn write_inputs(out: &mut String, document: &Value, operation: &Value) -> fmt::Result {
    let query = operation["parameters"].as_array().into_iter().flatten();
    let query = query.map(|parameter| (Text(&parameter["name"]).as_str(), &parameter["schema"]));
    let body = operation
        .pointer("/requestBody/content/application~1json/schema")
        .map(|schema| follow(document, schema));
    let fields = body.and_then(|schema| schema["properties"].as_object());
    let fields = fields.into_iter().flatten();
    let mut inputs = query
        .chain(fields.map(|(name, schema)| (name.as_str(), schema)))
        .peekable();
    if inputs.peek().is_none() {
        return Ok(());
    }
    out.push_str("<table>\n");
    for (name, schema) in inputs {
        let (kind, meaning) = (kind(schema), Text(&schema["description"]));
        writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{meaning}</td></tr>",
            Escaped(name),
            Escaped(&kind)
        )?;
    }
    out.push_str("</table>\n");
    Ok(())
}

/// What a reference leads to.
fn follow<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let pointer = schema["$ref"].as_str().and_then(|text| text.strip_prefix('#'));
    pointer
        .and_then(|pointer| document.pointer(pointer))
        .unwrap_or(schema)
}

/// A schema's type in a word or two.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|text| text.rsplit('/').next()) {
        return name.to_owned();
    }
    let names = match (&schema["type"], &schema["enum"], &schema["oneOf"]) {
        (Value::String(one), ..) => return one.clone(),
        (Value::Array(types), ..) => types,
        (_, Value::Array(values), _) => values,
        (_, _, Value::Array(several)) => return several.iter().map(kind).collect::<Vec<_>>().join(" or "),
        _ => return String::new(),
    };
    let names = names
        .iter()
        .filter_map(Value::as_str)
        .filter(|name| *name != "null");
    names.collect::<Vec<_>>().join(" or ")
}

/// A string of the document, escaped.
struct Text<'a>(&'a Value);

impl<'a> Text<'a> {
    fn as_str(&self) -> &'a str {
        self.0.as_str().unwrap_or_default()
    }
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped(self.as_str()).fmt(out)
    }
}

struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '<' => out.write_str("&lt;")?,
                '>' => out.write_str("&gt;")?,
                '&' => out.write_str("&amp;")?,
                '"' => out.write_str("&quot;")?,
                c => out.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn types_are_named_and_text_is_escaped() {
        assert_eq!(
            kind(&json!({"type": ["string", "array", "null"]})),
            "string or array"
        );
        assert_eq!(kind(&json!({"enum": ["wait", "keep"]})), "wait or keep");
        assert_eq!(
            kind(&json!({"oneOf": [{"type": "null"}, {"$ref": "#/x/Y"}]})),
            "null or Y"
        );
        assert_eq!(
            Escaped("<a & \"b\">").to_string(),
            "&lt;a &amp; &quot;b&quot;&gt;"
        );
    }
}
