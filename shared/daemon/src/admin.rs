//! The admin port: `/livez`, `/readyz`, `/status` (JSON) and `/metrics` (Prometheus text), and the client side of them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// What a broker tells about itself.
pub trait Observed: Send + Sync + 'static {
    /// `Err` says why nobody can be served: it stops, or has failed. Being full, or without a link, is no reason.
    fn ready(&self) -> Result<(), String>;
    /// Whether it is ready for one kind of work, which `/readyz?for=` names; `None` where there is no such kind.
    fn ready_for(&self, what: &str) -> Option<Result<(), String>>;
    /// Everything a person wants to see.
    fn status(&self) -> serde_json::Value;
}

/// Serves the admin port until `stop` turns true. `more` holds routes of the broker's own.
pub async fn serve(
    listener: TcpListener,
    observed: Arc<dyn Observed>,
    collector: Box<dyn Collector>,
    more: Router,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut registry = Registry::default();
    registry.register_collector(collector);
    let registry = Arc::new(registry);
    let metrics = move || {
        let registry = registry.clone();
        async move {
            let mut text = String::new();
            match encode(&mut text, &registry) {
                Ok(()) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
                Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            }
        }
    };
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .with_state(observed)
        .route("/metrics", get(metrics))
        .merge(more);
    axum::serve(listener, router)
        .with_graceful_shutdown(async move {
            let _ = stop.wait_for(|stop| *stop).await;
        })
        .await
}

const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What may be asked of `/readyz`.
#[derive(Deserialize)]
struct ReadyQuery {
    r#for: Option<String>,
}

async fn readyz(State(observed): State<Arc<dyn Observed>>, Query(query): Query<ReadyQuery>) -> impl IntoResponse {
    let ready = match &query.r#for {
        None => Some(observed.ready()),
        Some(what) => observed.ready_for(what),
    };
    match ready {
        Some(Ok(())) => (StatusCode::OK, "ok\n".to_owned()),
        Some(Err(why)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        None => (
            StatusCode::BAD_REQUEST,
            "there is no such kind of readiness; leave ?for= out, or see operating.md\n".to_owned(),
        ),
    }
}

async fn status(State(observed): State<Arc<dyn Observed>>) -> impl IntoResponse {
    Json(observed.status())
}

/// Asks a running broker for its status.
pub async fn fetch_status(admin: &str) -> anyhow::Result<serde_json::Value> {
    let url = format!("{}/status", admin.trim_end_matches('/'));
    let hint = || format!("no answer from {url}: is the broker running, and is --admin its [admin] listen?");
    let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build()?;
    let answer = client.get(&url).send().await.with_context(hint)?.error_for_status().with_context(hint)?;
    serde_json::from_slice(&answer.bytes().await?).with_context(|| format!("{url} did not answer with JSON"))
}

/// Lays rows out in columns, the first row being the heading.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_table_lines_its_columns_up() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = super::table(&[row(["STREAM", "NEXT"]), row(["a", "17"])]);
        assert_eq!(text, "STREAM  NEXT\na       17\n");
    }
}
