//! `GET /v1/models`.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use phalanx_proto::v1::ModelCard;
use serde::Serialize;

use super::error::ApiError;
use crate::routes::Service;

#[derive(Serialize)]
struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    id: String,
    object: &'static str,
    created: i64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: u32,
}

impl Model {
    fn of(card: ModelCard) -> Self {
        Self {
            id: card.id,
            object: "model",
            created: card.created,
            owned_by: "phalanx",
            root: card.root,
            parent: None,
            max_model_len: card.max_model_len,
        }
    }
}

pub(crate) async fn handle(State(service): State<Service>) -> Result<Response, ApiError> {
    let reply = service.backend.list_models().await?;
    let data = reply.models.into_iter().map(Model::of).collect();
    Ok(Json(ModelList { object: "list", data }).into_response())
}
