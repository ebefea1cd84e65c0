//! Requests to the HTTP API of Vault and OpenBao.

use ureq::http::{HeaderValue, Method, Request, Uri};
use zeroize::Zeroizing;

use crate::kms::{
    KmsError,
    deadline::Deadline,
    http::{Answer, Http, NoAnswer, authority},
};

/// A token of the service's. Wiped on drop.
pub(super) struct Token(Zeroizing<String>);

impl Token {
    /// The token, if the text can be one.
    pub(super) fn new(text: Zeroizing<String>) -> Option<Self> {
        let fits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then_some(Self(text))
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

/// A server, and the namespace in it.
#[derive(Clone, Debug)]
pub(super) struct Api {
    pub(super) server: Uri,
    pub(super) namespace: Option<HeaderValue>,
    pub(super) http: Http,
}

impl Api {
    /// The server, for messages.
    pub(super) fn host(&self) -> &str {
        authority(&self.server)
    }

    pub(super) fn post(
        &self,
        path: &str,
        token: Option<&Token>,
        body: &[u8],
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        self.send(Method::POST, path, token, body, deadline)
    }

    pub(super) fn get(
        &self,
        path: &str,
        token: &Token,
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        self.send(Method::GET, path, Some(token), &[], deadline)
    }

    /// Sends a request. It tries twice if the connection breaks, because the server may have closed
    /// a kept connection.
    fn send(
        &self,
        method: Method,
        path: &str,
        token: Option<&Token>,
        body: &[u8],
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        let mut again = true;
        loop {
            let request = self.request(&method, path, token, body)?;
            match self.http.send(request, deadline) {
                Err(NoAnswer::Broken(_)) if again => again = false,
                Err(why @ NoAnswer::TooLong(_)) => return Err(KmsError::invalid(why.to_string())),
                Err(why) => return Err(KmsError::unreachable(why.to_string())),
                Ok(answer) => return Ok(answer),
            }
        }
    }

    fn request<'a>(
        &self,
        method: &Method,
        path: &str,
        token: Option<&Token>,
        body: &'a [u8],
    ) -> Result<Request<&'a [u8]>, KmsError> {
        let scheme = self.server.scheme_str().unwrap_or_default();
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{scheme}://{}/v1/{path}", self.host()))
            // A proxy of Vault's may require this header against forged requests of browsers.
            .header("x-vault-request", "true");
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        if let Some(namespace) = &self.namespace {
            request = request.header("x-vault-namespace", namespace);
        }
        if let Some(Token(token)) = token {
            let value = HeaderValue::from_str(token);
            let mut value =
                value.map_err(|_| KmsError::unreachable("the token fits into no header"))?;
            value.set_sensitive(true);
            request = request.header("x-vault-token", value);
        }
        request.body(body).map_err(|_| KmsError::invalid("the request fits into no HTTP request"))
    }
}
