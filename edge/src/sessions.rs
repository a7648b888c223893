//! MQTT sessions as an operator sees and removes them: routes of the admin port, and `tributary-edge sessions`.

use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use daemon::admin::{AdminClient, table};
use mqtt::front::{Front, SessionInfo};
use serde::Deserialize;

/// Sessions of one answer.
const SESSIONS_PER_PAGE: usize = 500;

#[derive(Deserialize)]
struct After {
    #[serde(default)]
    after: String,
}

#[derive(Deserialize)]
struct Named {
    client: String,
}

/// `GET /sessions?after=CLIENT` answers with the next sessions in the order of their client identifiers, one JSON object per
/// line, none at the end. `DELETE /sessions?client=CLIENT` ends one, durably when it answers.
pub fn routes(front: Arc<Front>) -> Router {
    Router::new().route("/sessions", get(list).delete(remove)).with_state(front)
}

async fn list(State(front): State<Arc<Front>>, Query(query): Query<After>) -> Response {
    let page = front.sessions(&query.after, SESSIONS_PER_PAGE);
    let lines: String = page.iter().map(|session| serde_json::to_string(session).unwrap_or_default() + "\n").collect();
    ([(header::CONTENT_TYPE, "application/x-ndjson")], lines).into_response()
}

async fn remove(State(front): State<Arc<Front>>, Query(query): Query<Named>) -> Response {
    match front.remove_session(&query.client).await {
        Ok(true) => StatusCode::NO_CONTENT.into_response(),
        Ok(false) => (StatusCode::NOT_FOUND, format!("no session of client {:?}\n", query.client)).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

/// Prints all sessions, a page at a time.
pub async fn ls(admin: &AdminClient, json: bool) -> anyhow::Result<()> {
    let mut after = String::new();
    loop {
        let text = admin.get(&format!("/sessions?after={}", percent_encoded(&after))).await?;
        if json {
            print!("{text}");
        }
        let page: Vec<SessionInfo> = text
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .context("the broker answered with something else")?;
        let first = after.is_empty();
        match page.last() {
            Some(last) => after = last.client_id.clone(),
            None if first && !json => println!("no sessions"),
            None => {}
        }
        if !json && !page.is_empty() {
            let text = render(&page);
            // The heading stands there once.
            print!("{}", if first { &text } else { text.split_once('\n').map_or("", |(_, rows)| rows) });
        }
        if page.is_empty() {
            return Ok(());
        }
    }
}

/// Ends one session; a connected client is disconnected.
pub async fn rm(admin: &AdminClient, client: &str) -> anyhow::Result<()> {
    admin.request(reqwest::Method::DELETE, &format!("/sessions?client={}", percent_encoded(client))).await?;
    println!("removed the session of {client:?}");
    Ok(())
}

/// A client identifier may be any UTF-8.
fn percent_encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => (byte as char).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

fn render(page: &[SessionInfo]) -> String {
    let heading = ["CLIENT", "USER", "STATE", "SUBSCRIPTIONS", "QUEUED", "BYTES", "ENDS"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for session in page {
        // What the clock said when it was left may have been wrong; its life is counted.
        let absent = session.expires_in_secs.map(|left| i64::from(session.expiry_secs).saturating_sub(left));
        let state = match (session.connected, absent) {
            (true, _) => "connected".to_owned(),
            (false, Some(secs)) => format!("absent for {}", span(secs)),
            (false, None) => "absent".to_owned(),
        };
        let ends = match (session.expires_in_secs, session.expiry_secs) {
            (Some(secs), _) => format!("in {}", span(secs)),
            (None, 0) => "with its connection".to_owned(),
            (None, u32::MAX) => "never".to_owned(),
            (None, secs) => format!("{} after its connection", span(i64::from(secs))),
        };
        rows.push(vec![
            session.client_id.escape_debug().to_string(),
            session.user.as_deref().unwrap_or("-").escape_debug().to_string(),
            state,
            session.subscriptions.to_string(),
            session.queued_messages.to_string(),
            session.queued_bytes.to_string(),
            ends,
        ]);
    }
    table(&rows)
}

/// In the largest unit that it is at least two of.
fn span(secs: i64) -> String {
    [(86_400, "d"), (3_600, "h"), (60, "min")]
        .iter()
        .find(|(unit, _)| secs >= 2 * unit)
        .map_or_else(|| format!("{secs} s"), |(unit, name)| format!("{} {name}", secs / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_a_row_that_says_when_it_ends() {
        let away = SessionInfo {
            client_id: "pump\n7".to_owned(),
            user: None,
            connected: false,
            left_ms: Some(0),
            subscriptions: 3,
            queued_messages: 12,
            queued_bytes: 4_000,
            expiry_secs: 7 * 86_400,
            expires_in_secs: Some(5 * 86_400),
        };
        let here = SessionInfo { connected: true, expires_in_secs: None, ..away.clone() };
        let text = render(&[away, here]);
        for part in ["pump\\n7", "absent for 2 d", "in 5 d", "connected", "7 d after its connection", "12", "4000"] {
            assert!(text.contains(part), "{part} not in\n{text}");
        }
        assert_eq!(percent_encoded("a/ü&"), "a%2F%C3%BC%26");
    }
}
