//! The OpenAPI document of this server, made of the table of routes, and the same as a page to read.
//!
//! It cannot drift from the handlers: paths and methods come from the table that the router is built of, and a test
//! compares the documented fields of every body with those that its deserializer knows ([`fields::of`]).

mod fields;
pub(crate) mod operations;
mod page;
mod schemas;

use axum::{
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use http::header;
use serde_json::{Map, Value, json};

pub(crate) use self::operations::Operation;
use self::schemas::{Field, Schema};
use crate::routes::{Route, Service};

/// Both forms of the document, made once.
#[derive(Debug)]
pub(crate) struct Document {
    json: Bytes,
    page: Bytes,
}

impl Document {
    /// Documents `routes`, which clients find under `root_path`.
    pub(crate) fn of(routes: &[Route], root_path: &str) -> Self {
        let document = document(routes, root_path);
        Self {
            page: page::html(&document).into(),
            json: document.to_string().into(),
        }
    }
}

/// `GET /openapi.json`.
pub(crate) async fn json(State(service): State<Service>) -> Response {
    let content_type = [(header::CONTENT_TYPE, "application/json")];
    (content_type, service.document.json.clone()).into_response()
}

/// `GET /docs`.
pub(crate) async fn page(State(service): State<Service>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        // It holds nothing but text and its own style.
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'",
        ),
    ];
    (headers, service.document.page.clone()).into_response()
}

fn document(routes: &[Route], root_path: &str) -> Value {
    let (mut paths, mut schemas) = (Map::new(), schemas::shared());
    for route in routes {
        let mut item = Map::new();
        for (method, operation) in &route.operations {
            for schema in &operation.schemas {
                schemas.insert(schema.name.to_owned(), schema.json());
            }
            item.insert((*method).to_owned(), operation.json(method, route));
        }
        paths.insert(route.path.to_owned(), item.into());
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Phalanx",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "A distributed LLM server. Routes and fields are those of `vllm serve`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": if root_path.is_empty() { "/" } else { root_path }}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{config::RouteOptions, routes::table};

    fn everything() -> Vec<Route> {
        table(&RouteOptions {
            tokenizer_info: true,
            ..RouteOptions::default()
        })
    }

    #[test]
    fn the_documented_fields_are_those_that_are_read() {
        for route in everything() {
            for (_, operation) in &route.operations {
                for schema in &operation.schemas {
                    let accepted: BTreeSet<&str> = (schema.accepted)().into_iter().collect();
                    let documented: Vec<&str> = schema.fields().map(|(name, ..)| *name).collect();
                    let unique: BTreeSet<&str> = documented.iter().copied().collect();
                    let (path, name) = (route.path, schema.name);
                    assert_eq!(unique.len(), documented.len(), "{name}: a field is there twice");
                    assert!(!accepted.is_empty(), "{name} is not a derived struct");
                    let missing: Vec<_> = accepted.difference(&unique).collect();
                    assert!(
                        missing.is_empty(),
                        "{path} reads {missing:?}: add them to openapi/schemas.rs"
                    );
                    let extra: Vec<_> = unique.difference(&accepted).collect();
                    assert!(extra.is_empty(), "{path} does not read {extra:?} of {name}");
                    assert!(
                        schema.required.iter().all(|name| accepted.contains(name)),
                        "{name}"
                    );
                }
            }
        }
    }

    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_operation_has_a_name_of_its_own() {
        let document = document(&everything(), "/llm");
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 20, "{found:?}");
        for reference in found {
            let pointer = reference.strip_prefix('#').expect("within the document");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        let paths = document["paths"].as_object().expect("paths");
        let operations = paths
            .values()
            .flat_map(|item| item.as_object().expect("methods").values());
        let names: Vec<&str> = operations
            .map(|operation| operation["operationId"].as_str().expect("a name"))
            .collect();
        let unique: BTreeSet<&&str> = names.iter().collect();
        assert_eq!(unique.len(), names.len(), "{names:?}");
        assert_eq!(document["servers"][0]["url"], "/llm");
        assert_eq!(paths["/ping"].as_object().expect("methods").len(), 2);
    }

    #[test]
    fn the_page_names_every_route_and_loads_nothing() {
        let routes = everything();
        let document = Document::of(&routes, "");
        let page = String::from_utf8(document.page.to_vec()).expect("text");
        for route in &routes {
            assert!(page.contains(&format!("{}</h2>", route.path)), "{}", route.path);
        }
        assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("<link"));
    }
}
