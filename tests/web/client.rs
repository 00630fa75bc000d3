//! A user of NetBox: a browser's session, and its calls to the API, over TLS.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::header::{COOKIE, REFERER, SET_COOKIE};
use reqwest::{Client, Method, Response};
use serde_json::Value;

/// A picture of one pixel.
pub const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0\x1f\x15\xc4\x89\0\0\0\rIDATx\x9cc\xf8\xcf\xc0\xf0\x1f\0\x05\0\x01\xff\x89\x99=\x1d\0\0\0\0IEND\xaeB`\x82";

/// One user, logged in or not, who comes in at an address.
#[derive(Clone)]
pub struct Netbox {
    http: Client,
    base: String,
    cookies: BTreeMap<String, String>,
    /// How long a request may take.
    pub patience: Duration,
}

impl Netbox {
    pub fn new(http: Client, base: &str) -> Self {
        Netbox {
            http,
            base: base.to_string(),
            cookies: BTreeMap::new(),
            patience: Duration::from_secs(20),
        }
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        kind: &str,
        body: Vec<u8>,
    ) -> Result<Response, String> {
        let cookies: Vec<String> =
            self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.base))
            .header(COOKIE, cookies.join("; "))
            .header(REFERER, format!("{}{path}", self.base))
            .header("Accept", "application/json, text/html")
            .timeout(self.patience);
        if let Some(token) = self.cookies.get("csrftoken") {
            request = request.header("X-CSRFToken", token);
        }
        if !kind.is_empty() {
            request = request.header("Content-Type", kind).body(body);
        }
        let answer = request.send().await.map_err(|error| format!("{error:?}"))?;
        for cookie in answer.headers().get_all(SET_COOKIE) {
            let cookie = cookie.to_str().unwrap_or_default();
            let pair = cookie.split(';').next().unwrap_or_default();
            if let Some((name, value)) = pair.split_once('=') {
                self.cookies.insert(name.trim().to_string(), value.trim().to_string());
            }
        }
        Ok(answer)
    }

    /// The status and the text of a page.
    pub async fn get(&mut self, path: &str) -> Result<(u16, String), String> {
        let answer = self.send(Method::GET, path, "", Vec::new()).await?;
        let status = answer.status().as_u16();
        Ok((status, answer.text().await.map_err(|error| format!("{error:?}"))?))
    }

    /// Log in as a person does, with the page's form.
    pub async fn log_in(&mut self, user: &str, password: &str) -> Result<(), String> {
        let (status, page) = self.get("/login/").await?;
        if status != 200 {
            return Err(format!("the login page answers {status}: {page}"));
        }
        let token = page
            .split("name=\"csrfmiddlewaretoken\" value=\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .ok_or("the login page has no token")?;
        let form = format!("csrfmiddlewaretoken={token}&username={user}&password={password}");
        let kind = "application/x-www-form-urlencoded";
        let answer = self.send(Method::POST, "/login/", kind, form.into_bytes()).await?;
        let status = answer.status().as_u16();
        match self.cookies.contains_key("sessionid") {
            true if status == 302 => Ok(()),
            _ => Err(format!("logging in answers {status}")),
        }
    }

    /// A call of the API; what it answers with 2xx.
    pub async fn call(
        &mut self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<Value, String> {
        let (kind, body) = match body {
            Some(body) => ("application/json", body.to_string().into_bytes()),
            None => ("", Vec::new()),
        };
        self.read(method, path, kind, body).await
    }

    async fn read(
        &mut self,
        method: Method,
        path: &str,
        kind: &str,
        body: Vec<u8>,
    ) -> Result<Value, String> {
        let answer = self.send(method, path, kind, body).await?;
        let status = answer.status();
        let text = answer.text().await.map_err(|error| format!("{error:?}"))?;
        if !status.is_success() {
            let shown: String = text.chars().take(500).collect();
            return Err(format!("{path} answers {status}: {shown}"));
        }
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))
    }

    /// Attach a picture to a site; its link.
    pub async fn attach(&mut self, site: u64, picture: &[u8]) -> Result<String, String> {
        const BOUNDARY: &str = "----stanchion";
        let mut body = Vec::new();
        for (name, value) in
            [("object_type", "dcim.site"), ("object_id", &site.to_string()), ("name", "picture")]
        {
            body.extend(
                format!(
                    "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"
                )
                .bytes(),
            );
        }
        body.extend(
            format!(
                "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"image\"; \
                 filename=\"pixel.png\"\r\nContent-Type: image/png\r\n\r\n"
            )
            .bytes(),
        );
        body.extend(picture);
        body.extend(format!("\r\n--{BOUNDARY}--\r\n").bytes());
        let kind = format!("multipart/form-data; boundary={BOUNDARY}");
        let path = "/api/extras/image-attachments/";
        let made = self.read(Method::POST, path, &kind, body).await?;
        made["id"].as_u64().map(|id| format!("{path}{id}/")).ok_or(format!("no id: {made}"))
    }

    /// The bytes behind a link, wherever it points.
    pub async fn fetch(&self, url: &str) -> Result<Vec<u8>, String> {
        let answer = self.http.get(url).send().await.map_err(|error| format!("{error:?}"))?;
        let status = answer.status();
        let bytes = answer.bytes().await.map_err(|error| format!("{error:?}"))?;
        if status.is_success() {
            Ok(bytes.to_vec())
        } else {
            Err(format!("{url} answers {status}"))
        }
    }
}
